"""What a run leaves behind: proved by gloria.audit, described by the model card."""
