#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| s2ds_fuzz::records(data));
