"""Training both stages of latent diffusion: losses, data, steps, checkpoints."""
