"""Tools that the studies share: recording, interventions, cases, statistics, figures."""
