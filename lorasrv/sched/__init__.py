"""Decides what each step computes: ids and integers in, a plan out."""
