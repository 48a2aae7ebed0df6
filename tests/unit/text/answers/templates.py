"""Chat templates that put turns and tools into a prompt as each family's own do.

Written for the tests after the published templates: the marks, the order and the shapes that
they read are theirs, the words around them are not.
"""

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nCall within <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is defined %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set function = tool_call.function %}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

QWEN_CODER = """
{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' + tool_call.function.name + '>\\n' }}
        {%- for name, value in tool_call.function.arguments | items %}
            {{- '<parameter=' + name + '>\\n' }}
            {{- value if value is string else value | tojson }}
            {{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""

GLM = """[gMASK]<sop>
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
{{ '<think>' + (m.reasoning_content or '') + '</think>' }}
{%- if m.content.strip() %}{{ '\\n' + m.content.strip() }}{% endif %}
{%- for tc in m.tool_calls or [] %}
{{ '<tool_call>' + tc.function.name }}
{% for k, v in tc.function.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>
{%- endfor %}
{%- else %}<|{{ m.role }}|>
{{ m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""

LLAMA = """
{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{%- endfor %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model makes one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if message.role == 'tool' else message.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message.content | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL_V3 = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}
                {{- raise_exception('ids have 9 letters or digits') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', ' }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL = MISTRAL_V3.replace("[TOOL_CALLS][", "[TOOL_CALLS]").replace(
    """{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}""",
    """{{- call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}""",
)

_BAR = "\uff5c"

DEEPSEEK = """
{%- for message in messages %}
    {%- if message['role'] == 'assistant' and message['tool_calls'] is defined %}
        {%- if message['content'] is none %}{{ '<think></think>' }}
        {%- else %}{{ message['content'] }}{%- endif %}
        {{- '<|tool▁calls▁begin|>' }}
        {%- for tool in message['tool_calls'] %}
            {{- '<|tool▁call▁begin|>' + tool['function']['name'] + '<|tool▁sep|>' }}
            {{- tool['function']['arguments'] + '<|tool▁call▁end|>' }}
        {%- endfor %}
        {{- '<|tool▁calls▁end|>' }}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|></think>' }}{% endif %}
""".replace("<|", "<" + _BAR).replace("|>", _BAR + ">")

DEEPSEEK_V3 = DEEPSEEK.replace(
    f"tool▁call▁begin{_BAR}>' + tool['function']['name'] + '<{_BAR}tool▁sep{_BAR}>'",
    f"tool▁call▁begin{_BAR}>function<{_BAR}tool▁sep{_BAR}>' + tool['function']['name']",
).replace(
    "{{- tool['function']['arguments'] + '",
    "{{- '\\n```json\\n' + tool['function']['arguments'] + '\\n```",
)

KIMI = """
{%- if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) }}{% endif %}
{%- for message in messages %}
    {{- '<|im_' + message.role + '|>' + (message.content or '') }}
    {%- if message.role == 'tool' %}{{ 'of ' + message.tool_call_id }}{% endif %}
    {%- if message.tool_calls %}
        {{- '<|tool_calls_section_begin|>' }}
        {%- for call in message.tool_calls %}
            {{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
            {{- (call.function.arguments | tojson) + '<|tool_call_end|>' }}
        {%- endfor %}
        {{- '<|tool_calls_section_end|>' }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}
"""

HARMONY = """
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role == 'system' %}
    {%- set instructions = messages[0].content %}{%- set messages = messages[1:] %}
{%- endif %}
{%- if instructions or tools %}
    {{- '<|start|>developer<|message|>' + (instructions or '') }}
    {%- for tool in tools or [] %}
        {{- '\\n// ' + tool.function.description + '\\ntype ' + tool.function.name + ' = (_: {' }}
        {{- tool.function.parameters.properties | join(', ') + '}) => any;' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and 'tool_calls' in message %}
        {%- if message.content and message.thinking %}
            {{- raise_exception('content and thinking in one message with calls') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {%- set last.name = call.name %}
        {%- if message.content or message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' }}
            {{- (message.content or message.thinking) + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json' }}
        {{- '<|message|>' + (call.arguments | tojson) + '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (message.content | tojson) + '<|end|>' }}
    {%- elif message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""

GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + (first or '' if loop.first else '') }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

TEMPLATES = {
    "hermes": QWEN,
    "qwen-coder": QWEN_CODER,
    "glm": GLM,
    "llama": LLAMA,
    "mistral-v3": MISTRAL_V3,
    "mistral": MISTRAL,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek": DEEPSEEK,
    "kimi": KIMI,
    "harmony": HARMONY,
    "plain": GEMMA,
}
