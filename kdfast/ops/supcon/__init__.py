"""Supervised contrastive loss."""
