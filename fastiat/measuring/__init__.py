"""Counting of errors under attack, and diagnosis of masked gradients."""
