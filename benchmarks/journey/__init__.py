"""From an empty folder to a served expert: the quickstart as it stands, and the same by PEFT, TRL and code by hand."""
