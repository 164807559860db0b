"""`python -m minivllm.course.authoring`."""

from minivllm.course.authoring.tool import main

raise SystemExit(main())
