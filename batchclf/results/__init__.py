"""What passes between the rooms (records), is written (writer) and is measured (stats)."""
