"""One file for each question asked of a model; `observe` runs any number of them in one pass over the denoising steps."""
