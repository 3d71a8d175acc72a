"""Operations worth more than a composition of library calls: one file each, with its plain definition."""
