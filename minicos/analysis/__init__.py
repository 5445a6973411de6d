"""One file for each question asked of a model; `record` runs any number of them in one pass over the denoising steps."""
