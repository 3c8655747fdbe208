"""What the paper claims, measured: Jha et al., *Learned Best-Effort LLM Serving*, arXiv 2401.07886.

`python -m agent.claims` plays what each claim is about (`playing`), judges the claims by it
(`judging`, pure) and shows them (`page`); `grid` asks how much rests on what the paper leaves open.
"""
