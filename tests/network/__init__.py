"""Tests on a network of namespaces. They use what the relay's tests use, the package `relay` beside this one."""
