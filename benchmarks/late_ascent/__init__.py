"""Comparison of SAM and SGD after the deferral: does SAM help rare classes at a tuned learning rate?"""
