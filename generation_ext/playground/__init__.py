# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext playground`: a page to try the methods on, and the small things that it shows, made once and kept."""
