"""Model families, a folder per `model_type`, and what they share."""
