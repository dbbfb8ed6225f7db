"""Continual concept learning for latent diffusion, independent of any host."""
