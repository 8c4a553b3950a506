"""The model and all that generation needs: the files of this folder travel, byte for byte, with every exported model.

They import each other with one dot, so that they work here as `rdtrain.model` and there as a folder of their own. In order:
attention, cache, checkpointing, compiled, layers, linear_cross_entropy, recurrent (the model); information, noise, denoiser (one iteration
as a denoiser); text_random, solvers, sampling, adaptive, chain (K iterations); decoding (batches and turns of tokens); tokenizer and
its two kinds, sentencepiece_tokenizer and byte_level_tokenizer, generation (text); console, text_batches, __main__ (what a user types);
weights, description and exceptions (files, config.json, what errors say). configuration_rdtrain, modeling_rdtrain, chain_cache,
tokenization_rdtrain and transformers_arguments are for Hugging Face transformers, which nothing else here needs.
"""
