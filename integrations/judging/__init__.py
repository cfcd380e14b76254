"""`apt-hooks eval`: pictures of prompts by the base model and by LoRAs, and what judges say of them."""
