"""Speed, measured beside other engines: `peers` to measure, `subjects` what, `timing` how, `bench` all of it."""
