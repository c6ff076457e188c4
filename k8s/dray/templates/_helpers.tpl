{{- define "dray.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "dray.labels" -}}
app.kubernetes.io/name: dray
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "dray.selector" -}}
app.kubernetes.io/name: dray
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: proxy
{{- end -}}

{{- define "dray.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "dray.reach" -}}
{{- $by := .Values.reach.by | default (ternary "hostNetwork" "nodePort" (eq .Values.mode "daemonset")) -}}
{{- if and (eq .Values.mode "daemonset") (not (has $by (list "hostNetwork" "hostPort"))) -}}
{{- fail (printf "reach.by: %s is for mode: deployment; a daemonset is reached by hostNetwork or hostPort" $by) -}}
{{- end -}}
{{- if and (eq .Values.mode "deployment") (not (has $by (list "nodePort" "clusterIP"))) -}}
{{- fail (printf "reach.by: %s is for mode: daemonset; a deployment is reached by nodePort or clusterIP" $by) -}}
{{- end -}}
{{- if and (eq $by "clusterIP") (not .Values.reach.clusterIP) (not .Values.reach.mirror) -}}
{{- fail "reach.clusterIP: a free address of the cluster's Service range is needed, since nodes cannot resolve names" -}}
{{- end -}}
{{- if and .Values.reach.ipv6 (has $by (list "hostPort" "nodePort")) (not .Values.reach.mirror) -}}
{{- fail (printf "reach.ipv6: with %s nothing leads from 127.0.0.1 to an IPv6 address: use hostNetwork or clusterIP, or set reach.mirror" $by) -}}
{{- end -}}
{{- $by -}}
{{- end -}}

{{- define "dray.mirror" -}}
{{- $by := include "dray.reach" . -}}
{{- if .Values.reach.mirror -}}{{ .Values.reach.mirror }}
{{- else if eq $by "nodePort" -}}http://127.0.0.1:{{ .Values.reach.nodePort }}
{{- else if eq $by "clusterIP" -}}http://{{ include "dray.bracketed" .Values.reach.clusterIP }}:{{ .Values.reach.port }}
{{- else -}}http://127.0.0.1:{{ .Values.reach.port }}
{{- end -}}
{{- end -}}

{{- define "dray.bracketed" -}}
{{ ternary (printf "[%s]" .) . (contains ":" .) }}
{{- end -}}

{{/* What would make pods that never start. */}}
{{- define "dray.sensible" -}}
{{- if regexMatch "(?m)^[ \\t]*\\[+[ \\t]*(cache|peers|containerd)[ \\t]*[].]" .Values.config -}}
{{- fail "config: [cache], [peers] and [containerd] are written by the chart: use cache, peers, zones and containerd" -}}
{{- end -}}
{{- $first := regexFind "(?m)^[ \\t]*[^# \\t\\r\\n].*$" .Values.config | trim -}}
{{- if and $first (not (hasPrefix "[" $first)) -}}
{{- fail (printf "config: \"%s\" stands in no table: begin with one, such as [[registry]]; listen, admin and the like are values of the chart" $first) -}}
{{- end -}}
{{- $registry := ternary .Values.reach.port 5050 (eq (include "dray.reach" .) "hostNetwork") -}}
{{- $ports := list (int .Values.peers.port) (int .Values.metrics.port) (int $registry) -}}
{{- if ne (len (uniq $ports)) 3 -}}
{{- fail "reach.port, peers.port, metrics.port: each needs a port of its own" -}}
{{- end -}}
{{- range .Values.zones.names -}}
{{- if gt (len (printf "%s-%s" (include "dray.peersService" $) .)) 63 -}}
{{- fail (printf "zones.names: with \"%s\" the name of a Service is longer than 63 characters: take a shorter release name" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The zones that have a workload of their own; one without a name if there are none. */}}
{{- define "dray.zoneList" -}}
{{- if ne .Values.zones.by "none" -}}
{{- if not .Values.zones.names -}}{{- fail "zones.names: with zones.by each zone has to be named" -}}{{- end -}}
{{- end -}}
{{- if eq .Values.zones.by "nodes" -}}{{ toJson .Values.zones.names }}{{- else -}}[""]{{- end -}}
{{- end -}}

{{- define "dray.peersService" -}}
{{ include "dray.name" . }}-peers
{{- end -}}

{{- define "dray.domain" -}}
{{ .Release.Namespace }}.svc.{{ .Values.peers.clusterDomain }}
{{- end -}}

{{- define "dray.admin" -}}
{{- $all := ternary "[::]" "0.0.0.0" .Values.reach.ipv6 -}}
{{- $loopback := and (eq (include "dray.reach" .) "hostNetwork") (not .Values.metrics.enabled) -}}
{{ ternary "127.0.0.1" $all $loopback }}:{{ .Values.metrics.port }}
{{- end -}}

{{- define "dray.config" -}}
{{- include "dray.sensible" . -}}
{{- $by := include "dray.reach" . -}}
{{- $loopback := eq $by "hostNetwork" -}}
{{- $all := ternary "[::]" "0.0.0.0" .Values.reach.ipv6 -}}
listen = "{{ ternary "127.0.0.1" $all $loopback }}:{{ ternary .Values.reach.port 5050 $loopback }}"
admin = {{ include "dray.admin" . | quote }}
{{- if .Values.metrics.tokenSecret }}
admin_token_file = "/etc/dray/admin/token"
{{- end }}

[cache]
dir = "/var/cache/dray"
disk = {{ .Values.cache.disk | quote }}
keep_free = {{ .Values.cache.keepFree | default (ternary "5%" "16%" (not (empty .Values.cache.volume))) | quote }}
memory = {{ .Values.cache.memory | quote }}

[peers]
listen = "{{ $all }}:{{ .Values.peers.port }}"
{{- if eq .Values.zones.by "none" }}
service = "{{ include "dray.peersService" . }}.{{ include "dray.domain" . }}"
{{- else }}
{{- $services := list }}
{{- range .Values.zones.names }}
{{- $services = append $services (printf "%s = \"%s-%s.%s\"" (quote .) (include "dray.peersService" $) . (include "dray.domain" $)) }}
{{- end }}
service = { {{ join ", " $services }} }
zones = {{ .Values.zones.policy | quote }}
{{- end }}
{{- if .Values.peers.keySecret }}
key_file = "/etc/dray/peers/peers.key"
{{- end }}
{{- if and .Values.containerd.enabled (eq .Values.mode "daemonset") }}

[containerd]
hosts_dir = {{ .Values.containerd.hostsDir | quote }}
mirror = {{ include "dray.mirror" . | quote }}
{{- with .Values.containerd.configFile }}
config_file = {{ . | quote }}
{{- end }}
{{- end }}
{{- with .Values.config }}

{{ . | trim }}
{{- end }}
{{- end -}}

{{- define "dray.security" -}}
runAsUser: 65532
runAsGroup: 65532
runAsNonRoot: true
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* For what has to touch a node's files: root, without any right that it does not need. */}}
{{- define "dray.security.files" -}}
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
  add: ["CHOWN", "DAC_OVERRIDE", "FOWNER"]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* There is no dray for other systems. */}}
{{- define "dray.nodeSelector" -}}
nodeSelector:
  {{- merge (dict) .Values.nodeSelector (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- end -}}

{{/* The nodes whose files are changed. */}}
{{- define "dray.nodesPointed" -}}
nodeSelector:
  {{- $nodes := ternary .Values.nodeSelector .Values.containerd.nodeSelector (eq .Values.mode "daemonset") }}
  {{- merge (dict) $nodes (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- end -}}

{{/* For pods that write into directories of the node. */}}
{{- define "dray.seLinux" -}}
{{- with .Values.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "dray.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}
