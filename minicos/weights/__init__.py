"""Checkpoints: saying what one is (`inspect`), renaming (`names`), reading into a network (`load`), LoRA files (`lora`)."""
