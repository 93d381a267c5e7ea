"""Does SAM in the late phase help rare classes beyond what a tuned late learning rate does?"""
