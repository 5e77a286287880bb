"""nanorlhf: RLHF from scratch, in files that can be read. Start with ../train_ppo.py."""
