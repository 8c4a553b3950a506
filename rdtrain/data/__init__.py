"""From documents to batches of tokens: sources -> tokenizer -> shards -> loader.

Nothing here knows a model, an objective or an engine; of rdtrain.model only the tokenizer is used.
"""
