"""Private inference between hosts: certificates, mutual TLS, a server of sessions, and the client's own endpoint."""
