"""rdtrain: recurrent-depth language models, trained as denoising blocks."""
