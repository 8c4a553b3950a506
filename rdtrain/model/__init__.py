"""The model and all that generation needs: the files of this folder travel, byte for byte, with every exported model.

They import each other with one dot, so that they work here as `rdtrain.model` and there as a folder of their own. In order:
attention, cache, checkpointing, layers, linear_cross_entropy, recurrent (the model); information, noise, denoiser (one iteration as a
denoiser); solvers, sampling, chain (K iterations); tokenizer, generation (text).
"""
