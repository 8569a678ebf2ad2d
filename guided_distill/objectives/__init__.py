"""The stages, one file for each kind: settings, and a pure loss of a student, a teacher and a batch."""
