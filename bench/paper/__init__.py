"""The paper's tables: which trainings they need, how those are measured, what the rows say."""
