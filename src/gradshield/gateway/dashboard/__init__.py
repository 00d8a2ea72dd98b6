"""The operator's pages: projects, jobs, decisions, models, health and the audit log, drawn by the server."""
