"""What Gymnasium finds as a plugin when it is imported: names alone, nothing is loaded."""


def register() -> None:
    """Register the environment; called while Gymnasium itself is being imported."""
    from gymnasium.envs.registration import register as enrol

    enrol("besteffort/Routing-v0", entry_point="agent.environment:Routing")
