"""Which tiles a kernel uses: tables with a reason for each row, chosen without running anything."""
