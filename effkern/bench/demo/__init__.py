"""The main job: one small GPT trained twice on real text, stock PyTorch beside effkern."""
