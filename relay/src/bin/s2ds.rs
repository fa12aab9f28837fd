//! The program; what it does is in the library, where the fuzz targets find it too.

fn main() -> std::process::ExitCode {
    s2ds::main()
}
