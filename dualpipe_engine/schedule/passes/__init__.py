"""Plan in, plan out, or an error: lowering, the verifier, and rewrites that keep a plan's meaning.

What looks at costs to decide which rewrite to take stands in `search`.
"""
