"""Proof by ``kill -9``: real engines and a real hub are killed at random, and a subscriber is asked what came.

``make chaos`` runs it; ``docs/reliability.md`` says what it proves.
"""
