"""Operations worth more than a composition of library calls: one folder each, with its plain definition."""
