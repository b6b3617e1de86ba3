"""The two experiments of the Mamba plan, with the values that it prints."""
