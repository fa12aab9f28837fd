"""Globus Flows: where a stream becomes a step of a flow.

Will hold the action providers (`start`, `connect`, `monitor`, `status`, `release`), the flow definitions and the
local flow runner, and the entry points `s2cs` and `scistream-flows`, which may import everything. Installed as
`scistream_flows.actions`: siblings are imported relatively, the core by its absolute name.
"""
