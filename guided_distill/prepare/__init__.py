"""Prepares data once, before training: files from public packages, and masks for in-painting."""
