"""Globus Flows, and what serves and administers a facility: action providers, flows, the commands around them.

Installed as `scistream_flows.actions`: siblings are imported relatively, the core by its absolute name. It may import
all of scistream_flows, which imports nothing of it.
"""
