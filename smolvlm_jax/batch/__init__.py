"""The batch job: files of records in, one row for each record out, on one machine or on many hosts."""
