"""Checkpoints: identifying them (`inspect`), finding their parts (`layouts`, `hub`), naming them
(`variants`), renaming keys (`names`), reading them into a network (`load`), LoRA files (`lora`)."""
