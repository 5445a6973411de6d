"""Checkpoints: saying what one is (`inspect`), finding its parts (`layouts`, `hub`), naming it
(`variants`), renaming keys (`names`), reading into a network (`load`), LoRA files (`lora`)."""
