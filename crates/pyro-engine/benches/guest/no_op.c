/* Ends. Built without a library, so that starting it costs what a process costs, and nothing else. */
void _start(void) { __asm__ volatile("mov $60, %eax\n\txor %edi, %edi\n\tsyscall"); }
