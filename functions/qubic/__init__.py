"""The qubic service: the policy and the ledger, over HTTP (`api`) and for the other services (`operations`)."""
