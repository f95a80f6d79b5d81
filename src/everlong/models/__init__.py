"""One decoder, Memformer's encoder-decoder, and the bridge to Hugging Face transformers."""
