"""Pretraining and finetuning: `accelerate launch -m training.train --config FILE`."""
