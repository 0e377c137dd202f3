"""The transformer: its config, patches, conditioning; weights of others in convert/."""
