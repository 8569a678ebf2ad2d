"""What each stage minimises: pure functions of a student, a teacher and a batch."""
