"""Reading a running denoiser, and adding to its gradients: hook points, capture, the frozen pass."""
