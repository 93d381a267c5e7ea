"""Fused Sharpness-Aware Minimization, batched Lanczos Hessian spectra, and the long-tail system built on both."""
